from opd.bench.loop import main

if __name__ == "__main__":
    main()
