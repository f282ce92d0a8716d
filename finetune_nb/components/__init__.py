"""Components of a config: their `_type` names, their YAML, the objects made of them."""
