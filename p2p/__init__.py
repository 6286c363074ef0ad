"""Prompt-to-Prompt, the text side: tokens of a prompt, alignments between two prompts, schedules and the plan made of them."""
