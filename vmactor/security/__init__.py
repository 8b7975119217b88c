"""Who may do what: permissions of users, and labels of files."""
