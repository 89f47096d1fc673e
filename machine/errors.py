"""The errors that programs report in one line."""


class UserError(Exception):
  """Something that the user can put right; the message says what and how."""
