from opd.evaluation.evaluate import main

if __name__ == "__main__":
    main()
