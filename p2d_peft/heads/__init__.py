"""What an attention head is and which heads matter for a task."""
