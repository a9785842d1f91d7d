"""Evaluation: tasks, a runner, a sandbox for generated code, and reports next to the published numbers."""
