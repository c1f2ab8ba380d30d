"""Presentation: styles for QGIS, the HTML map, pictures, the demo's page and STAC items.

Nothing here computes a map; it reads the GeoTIFFs that `speciesmap.mapping` wrote, as any other
program would, and shows what their tags and band descriptions say they are.
"""
