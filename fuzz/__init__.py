"""Files from strangers, made on purpose: ``python -m fuzz`` feeds every loader with damaged and forged files."""
