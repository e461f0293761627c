"""What the commands share: one subject a module. Nothing here imports a command."""
