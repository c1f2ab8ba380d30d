"""Statistics of tables: taxa modelled on features, measured, calibrated, set against chance."""
