"""What responses are worth: reward models, functions, judges, the policy itself."""
