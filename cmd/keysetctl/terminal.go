package main

import (
	"os"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

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

// terminalWidth returns a function for the current width of the terminal. It returns
// nil if a line cannot be redrawn on the stream.
func terminalWidth(stream any, getenv func(string) string) func() int {
	f, ok := stream.(*os.File)
	if !ok || !cli.HasControl(f, getenv) {
		return nil
	}
	return func() int {
		width, _, err := term.GetSize(int(f.Fd()))
		if err != nil {
			return 0
		}
		return width
	}
}

// dropTyped discards unread input of a terminal.
func dropTyped(stream any) {
	if f, ok := stream.(*os.File); ok && cli.IsTerminal(f) {
		// If it fails, early answers count, as they do on a pipe.
		_ = unix.IoctlSetInt(int(f.Fd()), unix.TCFLSH, unix.TCIFLUSH)
	}
}
