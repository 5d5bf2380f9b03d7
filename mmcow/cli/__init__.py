# SPDX-License-Identifier: MIT
"""The command ``mmcow``: verbs over the public library. The only place that prints."""
