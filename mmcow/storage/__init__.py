# SPDX-License-Identifier: MIT
"""What the machine offers: files, mapped metadata, locks, names."""
