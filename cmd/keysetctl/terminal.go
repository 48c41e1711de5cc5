package main

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/cli"
)

// red is a parameter of the SGR sequence (ECMA-48, 8.3.117).
const red = "31"

// paint colors text; see [cli.Colored].
func paint(stream any, getenv func(string) string, color, text string) string {
	if !cli.Colored(stream, getenv) {
		return text
	}
	return "\x1b[" + color + "m" + text + "\x1b[0m"
}

// dropTyped discards unread input of a terminal.
func dropTyped(stream any) {
	if f, ok := stream.(*os.File); ok && cli.IsTerminal(f) {
		// If it fails, early answers count, as they do on a pipe.
		_ = unix.IoctlSetInt(int(f.Fd()), unix.TCFLSH, unix.TCIFLUSH)
	}
}
