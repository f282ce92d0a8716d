"""What needs a notebook: displays, widgets, the control panel."""
