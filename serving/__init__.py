"""Who answers. The chat endpoint and the labelling application will stand here."""
