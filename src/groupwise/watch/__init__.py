"""What people see of a run: metrics, the terminal, TensorBoard."""
