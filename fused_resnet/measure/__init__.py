"""`fused-resnet bench`: what the kernels and the models take, and what the hardware would allow.

`kernels.py` times layers, `models.py` whole models, `predict.py` predicts GPUs that are not here;
`documents.py` keeps results as data, `comparison.py` compares two of them, `page.py` and
`page_plots.py` draw them.
"""
