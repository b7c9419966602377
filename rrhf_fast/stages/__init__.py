"""What the commands share: options and errors, journal, endpoint, reward functions, run folders."""
