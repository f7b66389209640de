"""What several tests share; tests/README.md says which helper does what."""
