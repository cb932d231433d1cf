"""Fused forms of other libraries' modules, one file a library; see `forms.py`."""
