package main

import (
	"os"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// red is a parameter of the SGR sequence (ECMA-48, 8.3.117).
const red = "31"

// isTerminal reports whether a stream of the process is a terminal.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// paint colors text on a terminal, unless NO_COLOR is set to anything
// (no-color.org).
func paint(stream any, getenv func(string) string, color, text string) string {
	if !isTerminal(stream) || getenv("NO_COLOR") != "" || getenv("TERM") == "dumb" {
		return text
	}
	return "\x1b[" + color + "m" + text + "\x1b[0m"
}

// terminalWidth tells how wide the terminal is at each moment; nil when the
// stream is none on which a line can be redrawn.
func terminalWidth(stream any, getenv func(string) string) func() int {
	f, ok := stream.(*os.File)
	if !ok || !isTerminal(f) || getenv("TERM") == "dumb" {
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

// dropTyped forgets what was typed on a terminal and not read yet.
func dropTyped(stream any) {
	if f, ok := stream.(*os.File); ok && isTerminal(f) {
		// Without it the question is no worse than with a pipe.
		_ = unix.IoctlSetInt(int(f.Fd()), unix.TCFLSH, unix.TCIFLUSH)
	}
}
