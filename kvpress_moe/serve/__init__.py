"""The server: documents are compressed once, and any client of OpenAI's API asks about them."""
