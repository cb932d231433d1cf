"""`python -m fused_resnet.cli`, which is the command `fused-resnet`."""

from . import main

main()
