"""How losses combine and when they switch on."""
