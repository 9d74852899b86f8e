# SPDX-License-Identifier: Apache-2.0
"""What makes a site of docs/ (make docs), the pictures, and the parts of pages that come from the sources."""
