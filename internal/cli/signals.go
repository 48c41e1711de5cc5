package cli

import (
	"log/slog"
	"os"
	"os/signal"
	"syscall"
)

// Outlive keeps a daemon running when its terminal closes (SIGHUP) or the reader of its
// output ends (SIGPIPE, which by default ends a Go process whose write to standard output
// or error fails). Operators also send SIGHUP to make a daemon reload, so the log says
// that it does not. After stop SIGHUP ends the process again.
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
