"""What rlif's pages for people share: headers, templates, a browser's session, the theme, tokens as they are shown."""
