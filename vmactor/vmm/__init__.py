"""VMM drivers: how each virtual machine monitor is started, controlled and understood."""
