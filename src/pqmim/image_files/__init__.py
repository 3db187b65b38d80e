"""Files of pictures: what their bytes mean.

Pillow decodes the pixels. What it leaves aside or reads otherwise than the formats mean it (colors that are no ICC
profile, transparent colors, samples of other widths than 8 bits, orientations that are oddly written) is read here.

::

    opening      which format it is, and what is to be done for it; the one entrance
    png tiff raw boxes tags sizes      what files of one kind say
    samples      what Pillow has decoded, whatever the mode
    color icc    from what the samples mean to sRGB
"""
