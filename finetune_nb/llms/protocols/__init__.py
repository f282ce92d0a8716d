"""What requests in the protocols of client libraries ask for, and how they are answered."""
