package main

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
)

// The setting and the environment decide about the proxy, and the log has it.
func TestServerProxy(t *testing.T) {
	t.Parallel()
	const unused, used = "HTTPS_PROXY ignored", "server proxy configured"
	for name, tt := range map[string]struct {
		setting string
		env     map[string]string
		proxy   string // empty: none
		logged  string // empty: nothing
		wrong   string
	}{
		"neither":                 {},
		"environment not set":     {env: map[string]string{"HTTPS_PROXY": "http://p:1"}, logged: unused},
		"not set, lower case":     {env: map[string]string{"https_proxy": "p:1"}, logged: unused},
		"not set, and excepted":   {env: map[string]string{"HTTPS_PROXY": "http://p:1", "NO_PROXY": ".example.org"}},
		"not set, unusable":       {env: map[string]string{"HTTPS_PROXY": "socks5://p:1"}, logged: unused},
		"another's":               {env: map[string]string{"HTTP_PROXY": "http://p:1"}},
		"none":                    {setting: "none", env: map[string]string{"HTTPS_PROXY": "http://p:1"}},
		"URL":                     {setting: "http://p:1", env: map[string]string{"HTTPS_PROXY": "http://q:1", "NO_PROXY": "*"}, proxy: "http://p:1", logged: used},
		"URL with password":       {setting: "http://u:hunter2@p:1", proxy: "http://u:hunter2@p:1", logged: used},
		"environment":             {setting: "environment", env: map[string]string{"HTTPS_PROXY": "http://p:1"}, proxy: "http://p:1", logged: used},
		"environment, host alone": {setting: "environment", env: map[string]string{"HTTPS_PROXY": "p"}, proxy: "http://p:80", logged: used},
		"environment, excepted":   {setting: "environment", env: map[string]string{"HTTPS_PROXY": "http://p:1", "no_proxy": "server.example.org"}},
		"environment, empty":      {setting: "environment"},
		"environment, unusable":   {setting: "environment", env: map[string]string{"HTTPS_PROXY": "https://u:hunter2@p:1"}, wrong: "server_proxy is environment: HTTPS_PROXY is not an http:// URL"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var log bytes.Buffer
			cfg := &settings{ServerAddress: "server.example.org:8081", ServerProxy: tt.setting}
			proxy, err := serverProxy(cfg, func(k string) string { return tt.env[k] }, slog.New(slog.NewTextHandler(&log, nil)))
			got := ""
			if proxy != nil {
				got = proxy.String()
			}
			if got != tt.proxy || (err != nil) != (tt.wrong != "") || err != nil && !strings.HasPrefix(err.Error(), tt.wrong) {
				t.Errorf("got %q, %v; want %q, %q", got, err, tt.proxy, tt.wrong)
			}
			if !strings.Contains(log.String(), tt.logged) || (tt.logged == "") != (log.Len() == 0) || strings.Count(log.String(), "\n") > 1 {
				t.Errorf("logged %q, want %q", log.String(), tt.logged)
			}
			if err != nil && strings.Contains(err.Error(), "hunter2") || strings.Contains(log.String(), "hunter2") {
				t.Errorf("the password is in the error or log: %v, %s", err, log.String())
			}
		})
	}
}
