package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/url"

	"golang.org/x/net/http/httpproxy"

	"github.com/renewd/renewd/internal/config"
)

// What server_proxy may be beside a URL.
const (
	proxyUnset       = ""
	proxyNone        = "none"
	proxyEnvironment = "environment"
)

// parseProxy returns the proxy of the setting, nil where that names none. The error
// goes on after the name of the field, and does not hold the value: that may hold a
// password.
func parseProxy(setting string) (*url.URL, error) {
	switch setting {
	case proxyUnset, proxyNone, proxyEnvironment:
		return nil, nil
	}
	u, err := url.Parse(setting)
	switch {
	case err != nil:
		return nil, errors.New("is not a URL")
	case u.Scheme != "http":
		return nil, errors.New("is not an http:// URL: what goes through it is TLS already")
	case config.BadAddress(u.Host, true) != "":
		return nil, errors.New("has no host and port")
	case u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("has more than a host and port")
	}
	return u, nil
}

// serverProxy returns the proxy through which the server is reached, nil for none,
// and says so in the log.
func serverProxy(cfg *settings, getenv func(string) string, log *slog.Logger) (*url.URL, error) {
	proxy, err := parseProxy(cfg.ServerProxy)
	if err != nil {
		return nil, fmt.Errorf("server_proxy %w", err)
	}
	if cfg.ServerProxy == proxyUnset || cfg.ServerProxy == proxyEnvironment {
		if proxy, err = environmentProxy(cfg.ServerAddress, getenv); err != nil && cfg.ServerProxy == proxyEnvironment {
			return nil, fmt.Errorf("server_proxy is environment: HTTPS_PROXY %w; write it as http://proxy.example.org:3128", err)
		}
	}
	switch {
	case cfg.ServerProxy == proxyUnset && (proxy != nil || err != nil):
		log.Warn("HTTPS_PROXY not used for the connection to the server, set server_proxy to environment to use it, or to none")
		return nil, nil
	case proxy != nil:
		log.Info("server reached through a proxy", "proxy", proxy.Redacted())
	}
	return proxy, nil
}

// environmentProxy is what the environment says of the server: HTTPS_PROXY unless
// NO_PROXY names it, also in lower case. A host alone is http:// on port 80.
func environmentProxy(server string, getenv func(string) string) (*url.URL, error) {
	either := func(name, lower string) string {
		if v := getenv(name); v != "" {
			return v
		}
		return getenv(lower)
	}
	env := httpproxy.Config{HTTPSProxy: either("HTTPS_PROXY", "https_proxy"), NoProxy: either("NO_PROXY", "no_proxy")}
	u, err := env.ProxyFunc()(&url.URL{Scheme: "https", Host: server})
	if err != nil {
		return nil, errors.New("is not a URL")
	}
	if u == nil {
		return nil, nil
	}
	if u.Port() == "" && u.Scheme == "http" {
		u.Host += ":80"
	}
	return parseProxy(u.String())
}
