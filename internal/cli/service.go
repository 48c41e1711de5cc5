package cli

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"
)

// Started returns a function that a daemon calls when all its listeners are open. It
// notifies the service manager that the start is complete (sd_notify(3)), so that units
// ordered after the service start then. Without a service manager it does nothing.
func Started(getenv func(string) string, log *slog.Logger) func() {
	return func() { tell(getenv, log, ready) }
}

// ready says that the start or a reload is complete.
const ready = "READY=1"

// tell sends the service manager, if there is one, a state of the daemon.
func tell(getenv func(string) string, log *slog.Logger, state string) {
	name := getenv("NOTIFY_SOCKET")
	if name == "" {
		return
	}
	if err := notify(name, state); err != nil {
		log.Error("service manager not notified", "error", err)
	}
}

func notify(name, state string) error {
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("connect to NOTIFY_SOCKET: %w", err)
	}
	_, err = conn.Write([]byte(state))
	if err != nil {
		err = fmt.Errorf("write to NOTIFY_SOCKET: %w", err)
	}
	if closeErr := conn.Close(); err == nil && closeErr != nil {
		err = fmt.Errorf("close NOTIFY_SOCKET: %w", closeErr)
	}
	return err
}

// The priorities of lines in the journal (sd-daemon(3)).
const (
	journalError   = "<3>"
	journalWarning = "<4>"
	journalInfo    = "<6>"
	journalDebug   = "<7>"
)

// toJournal reports whether w is the stream to systemd's journal that JOURNAL_STREAM
// identifies (systemd.exec(5)), and was not redirected.
func toJournal(w io.Writer, getenv func(string) string) bool {
	f, ok := w.(*os.File)
	if !ok || getenv("JOURNAL_STREAM") == "" {
		return false
	}
	info, err := f.Stat()
	if err != nil {
		return false
	}
	stat, ok := info.Sys().(*syscall.Stat_t)
	return ok && getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", stat.Dev, stat.Ino)
}

// journal is a handler whose lines start with their priority. Without it every line has
// priority info, and "journalctl -p warning" shows nothing.
type journal struct {
	slog.Handler
	line *line
}

// line is the writer of the wrapped handler, which writes one record with each Write.
type line struct {
	w        io.Writer
	mu       sync.Mutex
	priority string
}

// Write writes a record with its priority. Handle calls it with mu held.
func (l *line) Write(record []byte) (int, error) {
	if _, err := l.w.Write(append([]byte(l.priority), record...)); err != nil {
		return 0, err
	}
	return len(record), nil
}

func (j journal) Handle(ctx context.Context, r slog.Record) error {
	j.line.mu.Lock()
	defer j.line.mu.Unlock()
	switch {
	case r.Level >= slog.LevelError:
		j.line.priority = journalError
	case r.Level >= slog.LevelWarn:
		j.line.priority = journalWarning
	case r.Level >= slog.LevelInfo:
		j.line.priority = journalInfo
	default:
		j.line.priority = journalDebug
	}
	return j.Handler.Handle(ctx, r)
}

func (j journal) WithAttrs(attrs []slog.Attr) slog.Handler {
	return journal{j.Handler.WithAttrs(attrs), j.line}
}

func (j journal) WithGroup(name string) slog.Handler {
	return journal{j.Handler.WithGroup(name), j.line}
}
