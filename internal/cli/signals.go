package cli

import (
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/renewd/renewd/internal/config"
)

// Hangups are the SIGHUPs that a daemon receives.
type Hangups struct {
	signals chan os.Signal
	serving chan struct{} // closed when the function of Each has returned; nil before
}

// Outlive keeps a daemon running when its terminal closes (SIGHUP) or the reader of its
// output ends (SIGPIPE, which by default ends a Go process whose write to standard output
// or error fails). The caller must call Stop.
func Outlive() *Hangups {
	signal.Ignore(syscall.SIGPIPE)
	// One that arrives before Each, or during a reload, causes one more.
	h := &Hangups{signals: make(chan os.Signal, 1)}
	signal.Notify(h.signals, syscall.SIGHUP)
	return h
}

// Each makes each SIGHUP call reload, one at a time, until Stop. It must be called once, by
// the goroutine that calls Stop.
func (h *Hangups) Each(reload func()) {
	h.serving = make(chan struct{})
	go func() {
		defer close(h.serving)
		for range h.signals {
			reload()
		}
	}()
}

// Stop waits for a reload in progress. After it SIGHUP ends the process.
func (h *Hangups) Stop() {
	signal.Stop(h.signals)
	close(h.signals)
	if h.serving != nil {
		<-h.serving
	}
}

// Reloader reloads the configuration of a running daemon. All fields are required.
type Reloader[C any] struct {
	Schema *config.Schema[C]
	// Running is the configuration in use. Reload replaces it.
	Running *C
	// Load loads the configuration again, as at the start.
	Load func() (*C, error)
	// Apply applies a configuration whose fields differ from Running only where
	// [config.Field] says Reload. It changes nothing if it returns an error.
	Apply  func(*C) error
	Log    *slog.Logger
	Getenv func(string) string
}

// Reload applies the configuration if all of it can be used without a restart. Otherwise
// it changes nothing. It logs what it did, and tells the service manager when it begins and
// ends (sd_notify(3)). It must not be called concurrently.
func (r *Reloader[C]) Reload() {
	if state, err := reloading(); err != nil {
		r.Log.Error("service manager not notified of the reload", "error", err)
	} else {
		tell(r.Getenv, r.Log, state)
	}
	// A failed reload ends it, too: the daemon continues.
	defer tell(r.Getenv, r.Log, ready)
	changed, err := r.reload()
	if err != nil {
		r.Log.Error("configuration not reloaded, the running one stays in use", "error", err)
		return
	}
	all := make([]string, len(changed))
	for i, c := range changed {
		all[i] = c.String()
	}
	r.Log.Info("configuration reloaded", "changed_fields", all)
}

func (r *Reloader[C]) reload() ([]config.Change, error) {
	next, err := r.Load()
	if err != nil {
		return nil, err
	}
	changed, err := r.Schema.Reloadable(r.Running, next)
	if err != nil {
		return nil, err
	}
	if err := r.Apply(next); err != nil {
		return nil, err
	}
	r.Running = next
	return changed, nil
}

// reloading returns the notification that a reload begins. The time lets systemd tell the
// READY=1 of this reload from an earlier one.
func reloading() (string, error) {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return "", fmt.Errorf("read the monotonic clock: %w", err)
	}
	return fmt.Sprintf("RELOADING=1\nMONOTONIC_USEC=%d", now.Nano()/1000), nil
}
