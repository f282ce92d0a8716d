"""Running epochs: the driver, what it observes, and what is written down."""
