"""What the processes share: messages, sockets and the files of the state directory."""
