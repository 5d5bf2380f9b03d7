# SPDX-License-Identifier: MIT
"""The NBD server: any chain of layers as a block device for running VMs."""
