"""Networks that tell how alike two pictures look: for losses of training, and for measuring.

Their weights come from packages of the Python Package Index, which are read and never imported (see `packages`).
What needs PyTorch imports it here; the codec never comes here.
"""
