# SPDX-License-Identifier: MIT
"""Image formats: where bytes are, where new ones may go."""
