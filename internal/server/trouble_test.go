package server_test

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/internal/server/rotation"
	"github.com/renewd/renewd/internal/server/seal"
	"github.com/renewd/renewd/internal/server/store"
)

// TestErrors: an error of the start names the field, the value and the remedy, and
// leaves nothing open: the corrected configuration works at once with the same store,
// socket and addresses.
func TestErrors(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		spoil func(t *testing.T, c *server.Config)
		is    error
		want  []string
	}{
		"certificate that is not there": {
			func(_ *testing.T, c *server.Config) {
				c.EndpointProfile, c.EndpointCertFile, c.EndpointKeyFile = server.ProfileWeb, "/missing/cert", "/missing/key"
			},
			os.ErrNotExist, []string{"bundle_endpoint", "/missing/cert"},
		},
		"rule": {
			func(_ *testing.T, c *server.Config) { c.Readers = []string{"spiffe://example.com/bob"} },
			nil, []string{"operators.readers[0]", "spiffe://example.com/bob", "operators need an SVID of it"},
		},
		"rotation": {
			func(_ *testing.T, c *server.Config) {
				c.Rotation = rotation.Policy{PreparationThreshold: 80 * 24 * time.Hour}
			},
			nil, []string{"preparation_threshold", "1920h0m0s", "give at most"},
		},
		"key that is not there": {
			func(_ *testing.T, c *server.Config) { c.KeyFile = "/missing/key" },
			os.ErrNotExist, []string{"key_file", "/missing/key", "server key new"},
		},
		"no key": {
			func(_ *testing.T, c *server.Config) { c.KeyFile = "" },
			nil, []string{"key_file", seal.CredentialName},
		},
		"another key": {
			func(t *testing.T, c *server.Config) {
				c.KeyFile = filepath.Join(t.TempDir(), "key.json")
				check(t, seal.NewFile(c.KeyFile))
			},
			seal.ErrWrongKey, []string{server.FileName, "deployment"},
		},
		"another trust domain": {
			func(_ *testing.T, c *server.Config) {
				c.TrustDomain, c.Managers, c.Readers = spiffeid.RequireTrustDomainFromString("example.com"), nil, nil
			},
			nil, []string{"belongs to trust domain example.org", "example.com", "correct trust_domain or data_dir"},
		},
		"folder that is a file": {
			func(_ *testing.T, c *server.Config) { c.DataDir = c.KeyFile },
			nil, []string{"data_dir", "key.json"},
		},
		"damaged": {
			func(t *testing.T, c *server.Config) {
				// A copy, because the original has to work afterwards.
				from := filepath.Join(c.DataDir, server.FileName)
				c.DataDir = t.TempDir()
				data, err := os.ReadFile(from)
				check(t, err)
				for i := range data[8192:] {
					data[8192+i] ^= 0xff
				}
				check(t, os.WriteFile(filepath.Join(c.DataDir, server.FileName), data, 0o600))
			},
			store.ErrDamaged, []string{server.FileName, "restore a backup"},
		},
		"store in use": {
			func(t *testing.T, c *server.Config) {
				d, err := server.Open(t.Context(), *c)
				check(t, err)
				t.Cleanup(func() { check(t, d.Close()) })
			},
			store.ErrInUse, []string{server.FileName, "stop that process first"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			good := newConfig(t, "east", "west")
			run(t, good).stop()
			bad := good
			bad.Deployments = append([]server.DeploymentConfig(nil), good.Deployments...)
			t.Run("start", func(t *testing.T) {
				test.spoil(t, &bad)
				d, err := server.Open(t.Context(), bad)
				if err == nil {
					check(t, d.Close())
				}
				checkError(t, err, test.is, test.want)
			})
			run(t, good)
		})
	}
}

func checkError(t *testing.T, err, is error, want []string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	if is != nil && !errors.Is(err, is) {
		t.Errorf("%v: is not %v", err, is)
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v: does not say %q", err, w)
		}
	}
}

func checkClosed(t *testing.T, lis net.Listener) {
	t.Helper()
	// On an open listener Accept would block; an expired deadline fails differently.
	if err := lis.(*net.TCPListener).SetDeadline(time.Now()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("listener is open: %v", err)
	}
}

// TestAddressInUse: every listener is opened before anything is served, and all are
// closed if one cannot be opened.
func TestAddressInUse(t *testing.T) {
	t.Parallel()
	for field, spoil := range map[string]func(t *testing.T, c *server.Config){
		"deployments.east.listen_address": func(t *testing.T, c *server.Config) { c.Deployments[0].ListenAddress = occupied(t) },
		"operators.address":               func(t *testing.T, c *server.Config) { c.OperatorAddress = occupied(t) },
		"bundle_endpoint.address":         func(t *testing.T, c *server.Config) { c.EndpointAddress = occupied(t) },
		"metrics.address":                 func(t *testing.T, c *server.Config) { c.MetricsAddress = occupied(t) },
		"admin_socket": func(t *testing.T, c *server.Config) {
			lis, err := net.Listen("unix", c.AdminSocket)
			check(t, err)
			t.Cleanup(func() { lis.Close() })
		},
	} {
		t.Run(field, func(t *testing.T) {
			t.Parallel()
			good := newConfig(t, "east", "west")
			bad := served(good, "east", "west")
			given, err := net.Listen("tcp", "127.0.0.1:0")
			check(t, err)
			bad.Deployments[1].Listener = given
			t.Run("start", func(t *testing.T) {
				spoil(t, &bad)
				d, err := server.Open(t.Context(), bad)
				check(t, err)
				err = d.Run(t.Context())
				checkError(t, err, nil, []string{field, "listens", "choose another"})
				checkClosed(t, given)
				if d.Ready() == nil {
					t.Error("ready")
				}
				check(t, d.Close()) // again
			})
			if _, err := os.Lstat(good.AdminSocket); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the admin socket: %v", err)
			}
			run(t, good)
		})
	}
}

// TestServingFails: an error of one server stops all others.
func TestServingFails(t *testing.T) {
	t.Parallel()
	c := newConfig(t, "east")
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	c.Deployments[0].Listener = lis
	c.WebConfigFile = "/missing/web.yaml"
	d, err := server.Open(t.Context(), c)
	check(t, err)
	checkError(t, d.Run(t.Context()), os.ErrNotExist, []string{"metrics", "/missing/web.yaml"})
	checkClosed(t, lis)
	c.Deployments[0].Listener, c.WebConfigFile = nil, ""
	run(t, c)
}

// TestClose closes a domain that is never run.
func TestClose(t *testing.T) {
	t.Parallel()
	c := newConfig(t, "east")
	lis, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	c.Deployments[0].Listener = lis
	d, err := server.Open(t.Context(), c)
	check(t, err)
	if d.Ready() == nil {
		t.Error("ready before it runs")
	}
	check(t, d.Close())
	check(t, d.Close())
	checkClosed(t, lis)
}
