package listen_test

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/listen"
)

// TestTCP: the error of an address in use names the process that has it.
func TestTCP(t *testing.T) {
	t.Parallel()
	first, err := listen.TCP("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	for _, host := range []string{"127.0.0.1", "0.0.0.0", ""} {
		_, port, _ := strings.Cut(first.Addr().String(), ":")
		_, err = listen.TCP(host + ":" + port)
		if err == nil || !errors.Is(err, syscall.EADDRINUSE) || config.IsPermanent(err) {
			t.Fatalf("%q: %v", host, err)
		}
		if want := fmt.Sprintf(`(PID %d), which listens there, or choose another address`, os.Getpid()); !strings.Contains(err.Error(), want) {
			t.Errorf("got  %v\nwant %s", err, want)
		}
	}
	// An address of another machine may be given to this one later.
	if _, err := listen.TCP("192.0.2.1:0"); err == nil || config.IsPermanent(err) || !strings.HasSuffix(err.Error(), ": give host:port of this machine") {
		t.Errorf("got %v", err)
	}
}
