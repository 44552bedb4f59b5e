"""wsss-deploy: run segmenters that were trained from weak labels."""
