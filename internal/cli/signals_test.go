package cli_test

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
)

type reloadable struct{ Fixed, Level string }

var reloadSchema = config.Schema[reloadable]{Fields: []config.Field[reloadable]{
	{Path: "fixed", Value: func(c *reloadable) any { return &c.Fixed }, Doc: "Fixed."},
	{Path: "level", Value: func(c *reloadable) any { return &c.Level }, Reload: true, Doc: "Level."},
}}

// TestReload: each reload tells the service manager when it begins and ends, and logs
// what has changed or why nothing has. A refused configuration does not become the running
// one.
func TestReload(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "notify")
	lis, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer lis.Close()
	var log bytes.Buffer
	var next *reloadable
	var loadErr, applyErr error
	var applied []string
	r := &cli.Reloader[reloadable]{
		Schema: &reloadSchema, Running: &reloadable{"f", "info"},
		Load: func() (*reloadable, error) { return next, loadErr },
		Apply: func(c *reloadable) error {
			if applyErr == nil {
				applied = append(applied, c.Level)
			}
			return applyErr
		},
		Log: slog.New(slog.NewTextHandler(&log, nil)), Getenv: func(string) string { return socket },
	}
	notified := regexp.MustCompile(`^RELOADING=1\nMONOTONIC_USEC=[1-9][0-9]*\nREADY=1\n$`)
	for _, tt := range []struct {
		name        string
		next        *reloadable
		load, apply error
		want        string
	}{
		{"a change", &reloadable{"f", "debug"}, nil, nil, `level=INFO msg="configuration reloaded" changed_fields="[level: \"info\" -> \"debug\"]"`},
		{"none", &reloadable{"f", "debug"}, nil, nil, `level=INFO msg="configuration reloaded" changed_fields=[]`},
		{"a restart", &reloadable{"g", "warn"}, nil, nil, `level=ERROR msg="configuration not reloaded, the running one stays in use" error="fixed (running \"f\", new \"g\"): not changed`},
		{"an invalid file", nil, errors.New("broken"), nil, `level=ERROR msg="configuration not reloaded, the running one stays in use" error=broken`},
		{"not applied", &reloadable{"f", "warn"}, nil, errors.New("refused"), `level=ERROR msg="configuration not reloaded, the running one stays in use" error=refused`},
		{"a change after that", &reloadable{"f", "warn"}, nil, nil, `changed_fields="[level: \"debug\" -> \"warn\"]"`},
	} {
		log.Reset()
		next, loadErr, applyErr = tt.next, tt.load, tt.apply
		r.Reload()
		if !strings.Contains(log.String(), tt.want) || strings.Count(log.String(), "\n") != 1 {
			t.Errorf("%s: log %s\nwant %s", tt.name, log.String(), tt.want)
		}
		var states string
		for range 2 {
			b := make([]byte, 1000)
			n, err := lis.Read(b)
			if err != nil {
				t.Fatal(err)
			}
			states += string(b[:n]) + "\n"
		}
		if !notified.MatchString(states) {
			t.Errorf("%s: notified\n%s", tt.name, states)
		}
	}
	if got := strings.Join(applied, " "); got != "debug debug warn" {
		t.Errorf("applied %s", got)
	}
}

// TestHangups: a SIGHUP that comes before the daemon is ready reloads once it is, and Stop
// waits for a reload.
func TestHangups(t *testing.T) { //nolint:paralleltest // signals are of the whole process
	h := cli.Outlive()
	if err := syscall.Kill(syscall.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	began, proceed := make(chan bool), make(chan bool)
	ended := false
	h.Each(func() {
		began <- true
		<-proceed
		ended = true
	})
	<-began
	go close(proceed)
	h.Stop()
	if !ended {
		t.Error("Stop has not waited for the reload")
	}
}
