"""The golden kit: tells an implementation of Mixtral's architecture whether it is right, and which mistake it made."""
