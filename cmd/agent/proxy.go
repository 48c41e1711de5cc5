package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/url"

	"golang.org/x/net/http/httpproxy"

	"github.com/renewd/renewd/internal/config"
)

// The values of server_proxy that are not URLs.
const (
	proxyUnset       = ""
	proxyNone        = "none"
	proxyEnvironment = "environment"
)

// parseProxy returns the proxy of the setting, nil if it has none. The error continues
// a sentence that begins with the field's name. It omits the value, which may have a
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
		return nil, errors.New("is not an http:// URL: the connection through it is TLS already")
	case config.BadAddress(u.Host, true) != "":
		return nil, errors.New("has no host and port")
	case u.Path != "" && u.Path != "/" || u.RawQuery != "" || u.Fragment != "":
		return nil, errors.New("has more than a host and port")
	}
	return u, nil
}

// serverProxy returns and logs the proxy for the connection to the server, nil for none.
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
		log.Warn("HTTPS_PROXY ignored for the connection to the server: set server_proxy to environment to use it, or to none")
		return nil, nil
	case proxy != nil:
		log.Info("server proxy configured", "proxy", proxy.Redacted())
	}
	return proxy, nil
}

// environmentProxy returns the proxy of HTTPS_PROXY, or nil if NO_PROXY matches the
// server. Both also work in lower case. A value without a scheme is an http:// proxy,
// and the default port is 80.
func environmentProxy(server string, getenv func(string) string) (*url.URL, error) {
	variable := func(name, lower string) string {
		if v := getenv(name); v != "" {
			return v
		}
		return getenv(lower)
	}
	env := httpproxy.Config{HTTPSProxy: variable("HTTPS_PROXY", "https_proxy"), NoProxy: variable("NO_PROXY", "no_proxy")}
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
