"""Tests in a browser. A package, so that its fixtures end when its last test has run."""
