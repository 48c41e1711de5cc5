package main

import (
	"context"
	"log/slog"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/internal/server"
	"github.com/renewd/renewd/metrics"
)

// runCommand runs the server until ctx is done.
func runCommand(ctx context.Context, call *cli.Call) error {
	load := schema.Flags(call.Flags, call.Getenv)
	if _, err := call.Parse(); err != nil {
		return err
	}
	completed := func() (*settings, error) {
		s, err := load()
		if err == nil {
			s.complete()
		}
		return s, err
	}
	s, err := completed()
	if err != nil {
		return err
	}
	if err := metrics.CheckWebConfig(s.WebConfigFile); err != nil {
		return config.FileError(err)
	}
	level := new(slog.LevelVar)
	level.Set(s.LogLevel)
	cfg := domainConfig(s)
	cfg.Log = cli.NewLog(call.Stderr, level, s.LogFormat, call.Getenv)
	hangups := cli.Outlive()
	defer hangups.Stop()
	var d *server.Domain
	reloader := &cli.Reloader[settings]{
		Schema: &schema, Running: s, Load: completed, Log: cfg.Log, Getenv: call.Getenv,
		Apply: func(next *settings) error {
			if err := d.Reload(domainConfig(next)); err != nil {
				return err
			}
			level.Set(next.LogLevel)
			return nil
		},
	}
	notify := cli.Started(call.Getenv, cfg.Log)
	cfg.Started = func() {
		notify()
		hangups.Each(reloader.Reload)
	}
	if d, err = server.Open(ctx, cfg); err != nil {
		return err
	}
	return d.Run(ctx)
}

// domainConfig converts the configuration.
func domainConfig(s *settings) server.Config {
	return server.Config{
		TrustDomain:      s.TrustDomain,
		DataDir:          s.DataDir,
		KeyFile:          s.KeyFile,
		Deployments:      s.deployments(),
		AdminSocket:      s.AdminSocket,
		AdminSocketMode:  s.AdminSocketMode,
		OperatorAddress:  s.OperatorAddress,
		Managers:         s.Managers,
		Readers:          s.Readers,
		EndpointAddress:  s.EndpointAddress,
		EndpointProfile:  s.EndpointProfile,
		EndpointCertFile: s.EndpointCertFile,
		EndpointKeyFile:  s.EndpointKeyFile,
		RefreshHint:      s.RefreshHint,
		Limits:           s.clientLimits(),
		Proxies:          s.proxies(),
		Federation:       s.endpoints(),
		MetricsAddress:   s.MetricsAddress,
		WebConfigFile:    s.WebConfigFile,
		KeysetLifetime:   s.KeysetLifetime,
		X509TTL:          s.X509TTL,
		JWTTTL:           s.JWTTTL,
		Rotation:         s.policy(),
		Version:          cli.Version(version),
	}
}
