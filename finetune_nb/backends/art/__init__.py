"""Training by OpenPipe ART: any implementation of its Backend protocol."""
