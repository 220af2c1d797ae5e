"""What tests share, and the programs that they start: no tests."""
