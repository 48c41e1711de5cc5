package cli

import (
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// Outlive keeps a daemon running when whoever started it goes away: the terminal
// (SIGHUP), or the reader of its output (SIGPIPE, which Go lets end a process
// whose write to standard output or error fails). SIGHUP is also what many send
// to make a daemon reload; the log tells them that it does not. The returned
// function ends the watch; after it SIGHUP ends the process again.
func Outlive(log *slog.Logger) (stop func()) {
	signal.Ignore(syscall.SIGPIPE)
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range hangups {
			log.Warn("SIGHUP ignored: reload is not supported, restart to apply changes")
		}
	}()
	return func() {
		signal.Stop(hangups)
		close(hangups)
		<-done
	}
}
