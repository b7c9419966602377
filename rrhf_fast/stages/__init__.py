"""Code that the commands share: options, errors, journal, run folders, endpoints, rewards."""
