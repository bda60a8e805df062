"""The shapes that callers see: models, problem documents, and the OpenAPI document with its examples."""
